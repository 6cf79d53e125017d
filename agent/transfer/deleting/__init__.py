"""What is taken away: tasks that delete, mirrors, and the walk that removes."""
