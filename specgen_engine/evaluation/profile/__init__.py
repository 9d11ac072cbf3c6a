"""What bounds a correct candidate: hardware counters where they can be read, kernel times where they can't."""
