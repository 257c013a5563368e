//! Imports between source files, read from their `use` lines and inline paths: rooms import only from rooms on lower
//! floors, and the imports of files form no cycle.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use crate::house::sources;

/// The rooms of each floor, from the lowest one. Rooms on the same floor do not import each other.
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

/// A module path below the crate, such as `["cache", "writer"]`.
type ModulePath = Vec<String>;

/// A path that a file names.
struct NamedPath {
    /// The deepest module of the path.
    module: ModulePath,
    /// The names after the module. Empty if the path is a module.
    names: Vec<String>,
    /// Whether the path is in a `pub use`.
    is_export: bool,
}

/// The source files of the crate and the imports between them.
struct Imports {
    /// File of each module.
    files: BTreeMap<ModulePath, String>,
    /// Re-exports: (exporting module, name) -> (defining module, name).
    exported: BTreeMap<(ModulePath, String), (ModulePath, String)>,
    /// Imported names by (importing file, imported file).
    edges: BTreeMap<(String, String), BTreeSet<String>>,
}

impl Imports {
    /// Reads the imports from sources as returned by [`sources`].
    fn read(sources: &[(String, String)]) -> Imports {
        let mut imports = Imports {
            files: BTreeMap::new(),
            exported: BTreeMap::new(),
            edges: BTreeMap::new(),
        };
        for (file, _) in sources.iter().filter(|(file, _)| file != "main.rs") {
            imports.files.insert(module_of(file), file.clone());
        }
        for (file, code) in sources {
            for path in imports.paths_of(file, code) {
                if path.is_export
                    && let Some(name) = path.names.last()
                {
                    let exported = (module_of(file), name.clone());
                    let defined = (path.module, path.names[0].clone());
                    imports.exported.insert(exported, defined);
                }
            }
        }
        for (file, code) in sources {
            for path in imports.paths_of(file, code) {
                let Some(name) = path.names.first().filter(|_| !path.is_export) else {
                    continue;
                };
                let owner = imports.owner(path.module, name);
                if owner != *file {
                    let edge = (file.clone(), owner);
                    imports.edges.entry(edge).or_default().insert(name.clone());
                }
            }
        }
        imports
    }

    /// Returns the paths of this crate that a file names in `use` statements or inline.
    fn paths_of(&self, file: &str, code: &str) -> Vec<NamedPath> {
        let mut paths = Vec::new();
        let mut imported: BTreeMap<String, ModulePath> = BTreeMap::new();
        let mut code_without_use = String::new();
        let mut unread = code;
        while let Some(start) = find_use(unread) {
            let line_start = unread[..start].rfind('\n').map_or(0, |at| at + 1);
            let end = start + unread[start..].find(';').expect("a `use` ends");
            code_without_use.push_str(&unread[..line_start]);
            let is_export = unread[line_start..start].contains("pub");
            for path in expand(&unread[start + "use ".len()..end]) {
                let module = &self.module_at(file, code, code.len() - unread.len() + start);
                if let Some((module, names)) = self.resolve(&path, module) {
                    if names.is_empty() {
                        imported.extend(module.last().map(|name| (name.clone(), module.clone())));
                    }
                    paths.push(NamedPath {
                        module,
                        names,
                        is_export,
                    });
                }
            }
            unread = &unread[end + 1..];
        }
        code_without_use.push_str(unread);
        let module = module_of(file);
        for path in inline_paths(&code_without_use) {
            let path = match imported.get(&path[0]) {
                Some(module) => ["crate".to_owned()]
                    .iter()
                    .chain(module)
                    .chain(&path[1..])
                    .cloned()
                    .collect(),
                None => path,
            };
            let resolved = self.resolve(&path, &module);
            paths.extend(resolved.map(|(module, names)| NamedPath {
                module,
                names,
                is_export: false,
            }));
        }
        paths
    }

    /// Returns the module of the code at byte `at` of a file. The file may contain inline modules.
    fn module_at(&self, file: &str, code: &str, at: usize) -> ModulePath {
        let mut module = module_of(file);
        let mut from = 0;
        while let Some(offset) = code[from..at].find("mod ") {
            let name_start = from + offset + "mod ".len();
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

    /// Splits a path in the code of `module` into its deepest module and the names after it. Returns None for a path of
    /// another crate.
    fn resolve(&self, path: &[String], module: &ModulePath) -> Option<(ModulePath, Vec<String>)> {
        let mut names = path.iter().filter(|name| *name != "self").peekable();
        let mut module = module.clone();
        match path[0].as_str() {
            "crate" | "distill" => {
                names.next();
                module.clear();
            }
            "super" => {
                while names.next_if(|name| *name == "super").is_some() {
                    module.pop();
                }
            }
            "self" => {}
            child => {
                module.push(child.to_owned());
                if !self.files.contains_key(&module) {
                    return None;
                }
                module.pop();
            }
        }
        while let Some(name) = names.peek() {
            module.push((*name).clone());
            if !self.files.contains_key(&module) {
                module.pop();
                break;
            }
            names.next();
        }
        Some((module, names.cloned().collect()))
    }

    /// Returns the file that defines a name. Follows re-exports.
    fn owner(&self, mut module: ModulePath, name: &str) -> String {
        let mut name = name.to_owned();
        // Re-exports are short chains. The bound ends a chain that leads to itself.
        for _ in 0..4 {
            let exported = self.exported.get(&(module.clone(), name.clone()));
            (module, name) = exported.cloned().unwrap_or((module, name));
        }
        while !self.files.contains_key(&module) && module.pop().is_some() {}
        self.files.get(&module).cloned().unwrap_or_default()
    }

    /// Describes the imports from another room that is not on a lower floor.
    fn upward(&self) -> Vec<String> {
        let floor = |file: &str| {
            let room = room_of(file);
            let floor = FLOORS.iter().position(|rooms| rooms.contains(&room));
            floor.unwrap_or_else(|| panic!("{file}: FLOORS does not contain the room `{room}`"))
        };
        let is_upward =
            |from: &str, to: &str| room_of(from) != room_of(to) && floor(from) <= floor(to);
        let edges = self.edges.iter();
        edges
            .filter(|((from, to), _)| is_upward(from, to))
            .map(|((from, to), names)| format!("{from} imports {names:?} from {to}"))
            .collect()
    }

    /// Returns the files in import cycles, and the files on a path from one cycle to another.
    fn in_cycles(&self) -> Vec<String> {
        let mut files: BTreeSet<&String> = self.files.values().collect();
        let mut edges: BTreeSet<(&String, &String)> =
            self.edges.keys().map(|(from, to)| (from, to)).collect();
        // Repeatedly removes the files that import no remaining file and the files that no remaining file imports.
        loop {
            let from: BTreeSet<&String> = edges.iter().map(|(from, _)| *from).collect();
            let to: BTreeSet<&String> = edges.iter().map(|(_, to)| *to).collect();
            let before = files.len();
            files.retain(|file| from.contains(file) && to.contains(file));
            edges.retain(|(from, to)| files.contains(from) && files.contains(to));
            if files.len() == before {
                return files.into_iter().cloned().collect();
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

/// Returns the byte at which the next `use` statement begins.
fn find_use(code: &str) -> Option<usize> {
    let mut from = 0;
    while let Some(start) = code[from..].find("use ").map(|offset| from + offset) {
        let line_start = code[..start].rfind('\n').map_or(0, |at| at + 1);
        let before = code[line_start..start].trim();
        let is_first = before.is_empty() || (before.starts_with("pub") && !before.contains(' '));
        // A string literal may contain the word at the beginning of a line.
        let is_of_tree = |char: char| char.is_alphanumeric() || "_:{},* \n".contains(char);
        let tree = code[start..].split(';').next().unwrap_or_default();
        if is_first && tree.chars().all(is_of_tree) {
            return Some(start);
        }
        from = start + "use ".len();
    }
    None
}

/// Returns the paths of a `use` tree.
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

/// Returns the paths of at least two names in code without `use` statements.
fn inline_paths(code: &str) -> Vec<Vec<String>> {
    let is_separator = |char: char| !(char.is_alphanumeric() || char == '_' || char == ':');
    let words = code.split(is_separator).filter(|word| word.contains("::"));
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
fn rooms_import_only_from_lower_floors_and_files_form_no_cycles() {
    let imports = Imports::read(&sources());
    // A reader that misses most imports would make this test pass.
    let edges = imports.edges.len();
    assert!(edges > 800, "only {edges} imports between files are read");
    assert_eq!(imports.upward(), Vec::<String>::new());
    assert_eq!(imports.in_cycles(), Vec::<String>::new());
}

/// `lib.rs` lists the rooms in a table, from the top. `main` and `lib` are not in it.
#[test]
fn map_in_lib_rs_shows_the_floors() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/lib.rs");
    let text = std::fs::read_to_string(path).unwrap();
    let rows = text.lines().filter_map(|line| line.strip_prefix("//! | "));
    let rows = rows.filter(|row| row.starts_with(|char: char| char.is_ascii_digit()));
    let rooms = |row: &str| -> BTreeSet<String> {
        let rooms = row.split(" | ").nth(1).unwrap().split(", ");
        rooms
            .map(|room| room.trim_matches(['[', '`', ']']).to_owned())
            .collect()
    };
    let mut map: Vec<BTreeSet<String>> = rows.map(rooms).collect();
    map.reverse();
    let floors = FLOORS[..FLOORS.len() - 1].iter();
    let floors: Vec<BTreeSet<String>> = floors
        .map(|rooms| rooms.iter().map(|room| room.to_string()).collect())
        .collect();
    assert_eq!(map, floors);
}

/// Adds reversed imports to the real sources.
#[test]
fn reversed_imports_are_detected() {
    let imports_with = |file: &str, line: &str| {
        let mut sources = sources();
        let (_, code) = sources
            .iter_mut()
            .find(|(name, _)| name == file)
            .expect("the file is there");
        code.insert_str(0, line);
        Imports::read(&sources)
    };
    let by_use = imports_with("cache/writer.rs", "use crate::harvest::{self, run};\n");
    assert_eq!(
        by_use.upward(),
        ["cache/writer.rs imports {\"run\"} from harvest/mod.rs"]
    );
    let inline = imports_with("ops/rope.rs", "fn f() { crate::model::Model::load(); }\n");
    assert_eq!(
        inline.upward(),
        ["ops/rope.rs imports {\"Model\"} from model/mod.rs"]
    );
    let cyclic = imports_with("cache/fingerprint.rs", "use super::keys::identity;\n");
    let files = cyclic.in_cycles();
    for file in ["cache/fingerprint.rs", "cache/keys.rs"] {
        assert!(files.iter().any(|name| name == file), "{file}: {files:?}");
    }
    assert_eq!(cyclic.upward(), Vec::<String>::new());
}
