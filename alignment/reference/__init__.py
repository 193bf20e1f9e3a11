"""What the policy is compared with: cached in a store, or computed beside it."""
