"""Facts of this computer: what it has, what works, what is missing."""
