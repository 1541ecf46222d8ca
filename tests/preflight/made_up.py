"""A chip that does not exist, with round numbers."""

from jaxinterp.preflight.chips import Chip

HERE = Chip("made up", flops=1e9, memory=2**30, memory_bandwidth=1e9, interconnect=1e8, clock=1e9)
