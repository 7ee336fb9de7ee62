"""Output for people: terminal tables, a store's inspection with plots, and the HTML report."""
