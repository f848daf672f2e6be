"""What ``mmssl shards`` does beside indexing: write shards from folders and tables, check them, measure them."""
