"""What several tests need: models, data, dense answers, runs on real workers. No tests."""
