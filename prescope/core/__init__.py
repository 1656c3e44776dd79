"""Types, settings, units, paths and facts about the machine; compiled code, and C functions called by their address."""
