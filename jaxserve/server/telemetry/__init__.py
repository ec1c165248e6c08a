"""What the server tells of its requests and its engine: metrics and traces."""
