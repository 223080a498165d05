"""Sample ids to encoded bytes, checked."""
