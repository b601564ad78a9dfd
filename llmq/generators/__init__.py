"""The service-ambitions generators: services in, plateaus or ambitions out, JSONL both ways."""
