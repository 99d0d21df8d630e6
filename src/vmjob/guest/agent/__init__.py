"""The agent: the program inside the machine. It only answers; the host asks.

Standard library only, because it runs on the guest's Python with nothing else
installed. In an image it is the package ``vmjob_agent``; the host imports the
same modules for the parts of the protocol that both ends share (`wire`,
`channel`, `tree`). The protocol is described in ``docs/reference/protocol.md``.
"""
