"""The QEMU driver: machines as processes of qemu-system, spoken to by QMP."""
