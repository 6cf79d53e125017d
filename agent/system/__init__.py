"""What differs between operating systems, such as locks on files. The rest of the agent asks here."""
