"""What has come becomes durable: temporaries, syncs, reading back, names, books."""
