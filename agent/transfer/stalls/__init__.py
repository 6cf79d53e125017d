"""Who stands still: processes and storage that say nothing are asked, looked at from outside, and told of."""
