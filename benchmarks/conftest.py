"""Benchmarks measure; they assert no time. Ratios within one run mean something, absolutes little."""
