"""Floor 9: measures of speed, through the public interface only."""
