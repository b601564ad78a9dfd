"""What really leaves: each request to a provider is noted with the call that it belongs to, hidden retries too."""
