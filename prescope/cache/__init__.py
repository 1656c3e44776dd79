"""Which expert is in which slot, who gives one up, and what waits for the link. Pure: no device, no bytes."""
