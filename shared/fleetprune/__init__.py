"""What the agent and the coordinator both speak: plain data, exact numbers, bytes."""
