"""A machine without a virtual machine: the real agent as a process of this computer.

For tests, of vmjob and of programs that use it: it starts in a tenth of a second and passes the
same contract tests as a hypervisor. It isolates nothing: jobs are processes of this computer.
"""

from vmjob.machine.fake.driver import FakeDriver, FakeMachine
from vmjob.machine.fake.faults import Faults
from vmjob.machine.fake.simulated import SimulatedDriver, SimulatedFaults, SimulatedMachine

__all__ = ["FakeDriver", "FakeMachine", "Faults", "SimulatedDriver", "SimulatedFaults",
           "SimulatedMachine"]
