"""Training: the loop that joins pipeline and model, checkpoints, evaluation, reports, export."""
import os

# Before torch is imported: its idle OpenMP threads must sleep, not spin. Beside DALI's threads on few cores, spinning makes
# a step of the small networks 9 times slower (2 cores, 126 against 1,102 images/s).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# And torch's C++ must not print stack traces of a connection that broke: train/parallel/failure.py names the cause.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
