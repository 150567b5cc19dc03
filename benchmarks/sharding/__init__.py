"""Which sharding, and will it fit: every strategy measured on devices that are here, or compiled ahead for others."""
