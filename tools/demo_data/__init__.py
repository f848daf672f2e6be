"""The parts of make_demo_data.py: captions (words and colours), glyphs (pictures), prose (text), shards (writing)."""
