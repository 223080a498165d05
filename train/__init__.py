"""Training: the loop that joins pipeline and model, checkpoints, evaluation, reports, export."""
import _signal  # type: ignore[import-not-found]  # the built-in part of signal, which takes no time to import
import os
import sys

_HERE, _WORDS = os.path.dirname(os.path.dirname(os.path.abspath(__file__))), sys.orig_argv[1:5]
if (any(word == "-m" and module.startswith(("train.", "tools.")) for word, module in zip(_WORDS, _WORDS[1:]))
        or os.path.abspath(sys.argv[0]).startswith(f"{_HERE}/tools/") or os.path.basename(sys.argv[0]) == "alexnet"):
    # One of our own commands starts: until it has handlers, Ctrl-C ends it (130 for a shell), without a traceback of its imports.
    _signal.signal(_signal.SIGINT, _signal.SIG_DFL)
# Before torch is imported: its idle OpenMP threads must sleep, not spin. Beside DALI's threads on few cores, spinning makes
# a step of the small networks 9 times slower (2 cores, 126 against 1,102 images/s).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# And torch's C++ must not print stack traces of a connection that broke: train/parallel/failure.py names the cause.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
