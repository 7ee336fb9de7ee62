"""The service: model, factors and index stay open, and questions are answered over HTTP."""
