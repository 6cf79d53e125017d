"""What is to be brought, and how: items, folders, comparisons, names that collide, links, attributes, packs."""
