"""Campaigns: crashes by the hundred, see docs/how-to/campaigns.md."""
