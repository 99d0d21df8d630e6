"""WHERE a job runs: the driver contract, and one folder per hypervisor."""
