"""Head patterns and masks: what they hold, their files, where they are shared, how they are drawn."""
