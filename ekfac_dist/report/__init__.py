"""What people are shown: tables, and a store's inspection."""
