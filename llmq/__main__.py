"""`python -m llmq` is the command `llmq`."""

from llmq.cli import app

if __name__ == "__main__":
    app(prog_name="llmq")
