"""Which heads need everything: gates that are trained, and what heads are seen to do."""

from sparse_compile.calibration.gates import Batches, train_gates
from sparse_compile.calibration.observing import Observations, echo_profile, observe
from sparse_compile.calibration.passkeys import Passkeys

__all__ = ["Batches", "Observations", "Passkeys", "echo_profile", "observe", "train_gates"]
