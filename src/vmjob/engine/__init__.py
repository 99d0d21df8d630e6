"""HOW: carries one job through its life on one machine. Knows no hypervisor."""
