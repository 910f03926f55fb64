"""Floor 9: measures of quality, through the public interface only."""
