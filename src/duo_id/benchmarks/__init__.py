"""Speed and memory under a head mask, beside full attention and beside what the machine could do at best."""
