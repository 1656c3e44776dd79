"""What happened, as tables: routing and events, and what is computed from them. No device, no decision."""
