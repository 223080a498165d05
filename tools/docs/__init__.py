"""The documentation's generated parts: references of configuration and commands, the README's chart."""
