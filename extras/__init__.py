"""What lies beyond the card, written like a fork of the core: see README.md in this folder."""
