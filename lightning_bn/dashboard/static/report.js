// The page by itself: everything it needs lies in the file.
import { Page } from "./app.js";
import { State, ownAddress } from "./state.js";
import { embeddedSource } from "./source.js";
import { watchTheme } from "./theme.js";

let page;
watchTheme(null, () => page?.isReady && page.draw());
page = new Page(document.getElementById("page"), embeddedSource(), new State(ownAddress()));
page.start();
