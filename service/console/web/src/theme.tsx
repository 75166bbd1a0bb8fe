// Light or dark: the system's preference, or what the user chose with the button.
import { useEffect, useState } from "preact/hooks";

type Theme = "light" | "dark";

const STORED_THEME = "carry.theme";
const system = matchMedia("(prefers-color-scheme: dark)");
const listeners = new Set<(theme: Theme) => void>();

function current(): Theme {
  const chosen = localStorage.getItem(STORED_THEME);
  return chosen === "light" || chosen === "dark" ? chosen : system.matches ? "dark" : "light";
}

export function applyTheme(): void {
  document.documentElement.dataset.theme = current();
  for (const listener of listeners) listener(current());
}
system.addEventListener("change", applyTheme);

/** The theme; draws again when it changes. */
export function useTheme(): Theme {
  const [theme, setTheme] = useState(current);
  useEffect(() => {
    listeners.add(setTheme);
    return () => void listeners.delete(setTheme);
  }, []);
  return theme;
}

export function ThemeButton() {
  const other = useTheme() === "dark" ? "light" : "dark";
  const switchTheme = () => {
    localStorage.setItem(STORED_THEME, other);
    applyTheme();
  };
  return (
    <button type="button" onClick={switchTheme}>
      {other === "dark" ? "Dark theme" : "Light theme"}
    </button>
  );
}
