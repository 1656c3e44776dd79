"""Words and doors: types, settings, units, paths, the machine at hand; compiled code and functions by their address."""
