"""Calibration: find the KV heads that need full attention, by training gates or by measuring attention."""

from sparse_compile.calibration.gate_training import Batches, train_gates
from sparse_compile.calibration.head_statistics import Observations, echo_profile, observe
from sparse_compile.calibration.passkey_data import Passkeys

__all__ = ["Batches", "Observations", "Passkeys", "echo_profile", "observe", "train_gates"]
