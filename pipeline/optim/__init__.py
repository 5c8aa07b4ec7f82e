"""Muon and AdamW for the sharded Moonlight, and the schedules that drive them."""
