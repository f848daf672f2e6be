"""The parts of bench_stream.py: photos (what is read), rivals (what is compared), processes (time and memory)."""
