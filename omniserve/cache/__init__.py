"""Floor 3: pages. Who owns them is plain Python (pool, manager); what they hold is `store`."""
