//! The arrows between files, read from their `use` lines: rooms import only from rooms below them, and no files
//! import each other in a circle.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use crate::house::sources;

/// The rooms from the ground up. Rooms of one floor do not import each other.
const FLOORS: [&[&str]; 14] = [
    &["ops", "fs", "terminal", "exit", "log", "clock"],
    &["config", "signal"],
    &["prompt", "rate_limit", "mock"],
    &["cache", "tokenizer"],
    &["data", "budget"],
    &["model", "export", "client"],
    &["train", "serve", "probe"],
    &["plan"],
    &["report", "eval"],
    &["harvest"],
    &["demo"],
    &["cli"],
    &["commands"],
    &["main", "lib"],
];

/// A module path below the crate, as in `["cache", "writer"]`.
type ModulePath = Vec<String>;

/// The source files of a crate, and who imports whom.
struct Imports {
    /// File of each module.
    files: BTreeMap<ModulePath, String>,
    /// Names that a module exports from another one: (module, name) -> (module, name).
    exported: BTreeMap<(ModulePath, String), (ModulePath, String)>,
    /// (importing file, imported file) -> names.
    arrows: BTreeMap<(String, String), BTreeSet<String>>,
}

impl Imports {
    /// Reads sources, given as path below `src/` and code without tests and comments.
    fn read(sources: &[(String, String)]) -> Imports {
        let mut imports = Imports {
            files: BTreeMap::new(),
            exported: BTreeMap::new(),
            arrows: BTreeMap::new(),
        };
        for (file, _) in sources.iter().filter(|(file, _)| file != "main.rs") {
            imports.files.insert(module_of(file), file.clone());
        }
        for (file, code) in sources {
            for (path, is_export) in imports.paths_of(file, code) {
                let (module, rest) = path;
                if is_export && let Some(name) = rest.last() {
                    let exported = (module_of(file), name.clone());
                    imports.exported.insert(exported, (module, rest[0].clone()));
                }
            }
        }
        for (file, code) in sources {
            for ((module, rest), is_export) in imports.paths_of(file, code) {
                let Some(name) = rest.first().filter(|_| !is_export) else {
                    continue;
                };
                let owner = imports.owner(module, name);
                if owner != *file {
                    let arrow = (file.clone(), owner);
                    imports
                        .arrows
                        .entry(arrow)
                        .or_default()
                        .insert(name.clone());
                }
            }
        }
        imports
    }

    /// The paths that a file names, as a module and the rest, and whether it exports them.
    fn paths_of(&self, file: &str, code: &str) -> Vec<((ModulePath, Vec<String>), bool)> {
        let mut paths = Vec::new();
        let mut imported: BTreeMap<String, ModulePath> = BTreeMap::new();
        let mut others = String::new();
        let mut rest = code;
        while let Some(start) = find_use(rest) {
            let line = rest[..start].rfind('\n').map_or(0, |at| at + 1);
            let end = start + rest[start..].find(';').expect("a `use` ends");
            others.push_str(&rest[..line]);
            let is_export = rest[line..start].contains("pub");
            for path in expand(&rest[start + 4..end]) {
                let module = &self.module_at(file, code, code.len() - rest.len() + start);
                if let Some((module, names)) = self.resolve(&path, module) {
                    if names.is_empty() {
                        imported.extend(module.last().map(|name| (name.clone(), module.clone())));
                    }
                    paths.push(((module, names), is_export));
                }
            }
            rest = &rest[end + 1..];
        }
        others.push_str(rest);
        let module = module_of(file);
        for path in inline_paths(&others) {
            let path = match imported.get(&path[0]) {
                Some(module) => ["crate".to_owned()]
                    .iter()
                    .chain(module)
                    .chain(&path[1..])
                    .cloned()
                    .collect(),
                None => path,
            };
            paths.extend(self.resolve(&path, &module).map(|path| (path, false)));
        }
        paths
    }

    /// The module at a byte of a file, which may hold modules itself.
    fn module_at(&self, file: &str, code: &str, at: usize) -> ModulePath {
        let mut module = module_of(file);
        let mut from = 0;
        while let Some(found) = code[from..at].find("mod ") {
            let name_start = from + found + 4;
            let line_end = name_start + code[name_start..].find(['{', ';', '\n']).unwrap_or(0);
            let is_open = code[line_end..].starts_with('{');
            let close = code[line_end..]
                .find("\n}")
                .map_or(code.len(), |end| line_end + end);
            if is_open && at < close {
                module.push(code[name_start..line_end].trim().to_owned());
            }
            from = name_start;
        }
        module
    }

    /// Splits a path that is named in `module` into the deepest module and the names behind it. None for other crates.
    fn resolve(&self, path: &[String], module: &ModulePath) -> Option<(ModulePath, Vec<String>)> {
        let mut names = path.iter().filter(|name| *name != "self").peekable();
        let mut at = module.clone();
        match path[0].as_str() {
            "crate" | "distill" => {
                names.next();
                at.clear();
            }
            "super" => {
                while names.next_if(|name| *name == "super").is_some() {
                    at.pop();
                }
            }
            "self" => {}
            child => {
                at.push(child.to_owned());
                if !self.files.contains_key(&at) {
                    return None;
                }
                at.pop();
            }
        }
        while let Some(name) = names.peek() {
            at.push((*name).clone());
            if !self.files.contains_key(&at) {
                at.pop();
                break;
            }
            names.next();
        }
        Some((at, names.cloned().collect()))
    }

    /// The file that defines a name, behind the modules that only export it.
    fn owner(&self, mut module: ModulePath, name: &str) -> String {
        let mut name = name.to_owned();
        // A few steps: an export may lead to itself.
        for _ in 0..4 {
            let exported = self.exported.get(&(module.clone(), name.clone()));
            (module, name) = exported.cloned().unwrap_or((module, name));
        }
        while !self.files.contains_key(&module) && module.pop().is_some() {}
        self.files.get(&module).cloned().unwrap_or_default()
    }

    /// Arrows that do not lead down from room to room.
    fn upward(&self) -> Vec<String> {
        let floor = |file: &str| {
            let room = room_of(file);
            let floor = FLOORS.iter().position(|rooms| rooms.contains(&room));
            floor.unwrap_or_else(|| panic!("{file}: the room `{room}` stands on no floor"))
        };
        let arrows = self.arrows.iter();
        let upward = arrows
            .filter(|((from, to), _)| room_of(from) != room_of(to) && floor(from) <= floor(to));
        upward
            .map(|((from, to), names)| format!("{from} imports {names:?} from {to}"))
            .collect()
    }

    /// Files that reach themselves by the arrows.
    fn in_circles(&self) -> Vec<String> {
        let mut left: BTreeSet<&String> = self.files.values().collect();
        let mut arrows: BTreeSet<(&String, &String)> =
            self.arrows.keys().map(|(a, b)| (a, b)).collect();
        // A file without an arrow to or from the others is in no circle.
        loop {
            let from: BTreeSet<&String> = arrows.iter().map(|(from, _)| *from).collect();
            let to: BTreeSet<&String> = arrows.iter().map(|(_, to)| *to).collect();
            let before = left.len();
            left.retain(|file| from.contains(file) && to.contains(file));
            arrows.retain(|(from, to)| left.contains(from) && left.contains(to));
            if left.len() == before {
                return left.into_iter().cloned().collect();
            }
        }
    }
}

fn module_of(file: &str) -> ModulePath {
    let path = file.trim_end_matches(".rs").trim_end_matches("/mod");
    let names = path
        .split('/')
        .filter(|name| *name != "lib" && *name != "main");
    names.map(str::to_owned).collect()
}

fn room_of(file: &str) -> &str {
    let room = Path::new(file).iter().next().and_then(|room| room.to_str());
    room.unwrap_or_default().trim_end_matches(".rs")
}

/// The byte at which the next `use` statement begins.
fn find_use(code: &str) -> Option<usize> {
    let mut from = 0;
    while let Some(at) = code[from..].find("use ").map(|at| from + at) {
        let line = code[..at].rfind('\n').map_or(0, |at| at + 1);
        let before = code[line..at].trim();
        let is_first = before.is_empty() || (before.starts_with("pub") && !before.contains(' '));
        // A text may contain the word at the beginning of a line.
        let is_of_tree = |char: char| char.is_alphanumeric() || "_:{},* \n".contains(char);
        let tree = code[at..].split(';').next().unwrap_or_default();
        if is_first && tree.chars().all(is_of_tree) {
            return Some(at);
        }
        from = at + 4;
    }
    None
}

/// The paths of a `use` tree.
fn expand(tree: &str) -> Vec<Vec<String>> {
    let tree = tree.trim();
    let Some((prefix, group)) = tree.split_once('{') else {
        let path = tree.split(" as ").next().unwrap_or(tree);
        return vec![
            path.split("::")
                .map(|name| name.trim().to_owned())
                .collect(),
        ];
    };
    let prefix: Vec<String> = prefix
        .split("::")
        .map(|name| name.trim().to_owned())
        .filter(|name| !name.is_empty())
        .collect();
    let group = group.trim_end().strip_suffix('}').expect("a group ends");
    let mut depth = 0;
    let parts = group.split(|char| {
        match char {
            '{' => depth += 1,
            '}' => depth -= 1,
            _ => {}
        }
        char == ',' && depth == 0
    });
    let parts = parts
        .filter(|part| !part.trim().is_empty())
        .flat_map(expand);
    parts
        .map(|path| prefix.iter().cloned().chain(path).collect())
        .collect()
}

/// Paths of at least two names in code without `use` statements.
fn inline_paths(code: &str) -> Vec<Vec<String>> {
    let is_path = |char: char| !(char.is_alphanumeric() || char == '_' || char == ':');
    let words = code.split(is_path).filter(|word| word.contains("::"));
    let words = words.map(|word| {
        word.trim_matches(':')
            .split("::")
            .map(str::to_owned)
            .collect()
    });
    words
        .filter(|path: &Vec<String>| path.len() > 1 && !path[0].is_empty())
        .collect()
}

#[test]
fn rooms_import_only_from_rooms_below_and_files_form_no_circles() {
    let imports = Imports::read(&sources());
    assert!(
        imports.arrows.len() > 800,
        "{} arrows are read",
        imports.arrows.len()
    );
    assert_eq!(imports.upward(), Vec::<String>::new());
    assert_eq!(imports.in_circles(), Vec::<String>::new());
}

/// Turns arrows of the real sources round.
#[test]
fn reversed_imports_are_found() {
    let with = |file: &str, line: &str| {
        let mut sources = sources();
        let (_, code) = sources
            .iter_mut()
            .find(|(name, _)| name == file)
            .expect("the file is there");
        code.insert_str(0, line);
        Imports::read(&sources)
    };
    let upward = with("cache/writer.rs", "use crate::harvest::{self, run};\n").upward();
    assert_eq!(
        upward,
        ["cache/writer.rs imports {\"run\"} from harvest/mod.rs"]
    );
    let inline = with("ops/rope.rs", "fn f() { crate::model::Model::load(); }\n").upward();
    assert_eq!(
        inline,
        ["ops/rope.rs imports {\"Model\"} from model/mod.rs"]
    );
    let circle = with("cache/fingerprint.rs", "use super::keys::identity;\n");
    let files = circle.in_circles();
    for file in ["cache/fingerprint.rs", "cache/keys.rs"] {
        assert!(files.iter().any(|name| name == file), "{file}: {files:?}");
    }
    assert_eq!(circle.upward(), Vec::<String>::new());
}
