"""The callback: what knows Lightning's Trainer."""
