"""The coordinator: traces, plans, aggregates, extracts and releases."""
