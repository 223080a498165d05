"""Profiles the data loader, stage by stage."""
