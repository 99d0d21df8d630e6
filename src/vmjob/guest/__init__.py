"""INSIDE the machine: the wire protocol, the host's client, and the agent that runs there."""
