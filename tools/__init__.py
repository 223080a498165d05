"""Thin commands over pipeline, model and train."""
