"""Who answers: a simulated provider (a pure model; in-process, or over HTTP) and any OpenAI-compatible endpoint."""
